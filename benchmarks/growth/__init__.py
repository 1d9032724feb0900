"""Growth of norms: how well a study forecasts the final norm of runs that it has not seen."""
