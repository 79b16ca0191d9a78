"""The report's experiment, in ran_ext and in the plain reference: plan, runs, claims, figures, page."""
