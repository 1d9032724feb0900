"""The trainer: configuration, model, data, schedule, one loop, exact resume."""
