"""Running recipes: steps in order, what is there already skipped, gates, publication."""
