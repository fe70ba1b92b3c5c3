"""Where the experts of a model lie, and what is left of them: found from a family's record, cut on stored bytes."""
