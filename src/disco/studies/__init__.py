"""Study files that come with the package; ``disco demo`` runs them, and they show the format."""
