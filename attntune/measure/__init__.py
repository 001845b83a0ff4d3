"""HOW FAST: candidates are built and run in processes that may die, checked before they are timed, and recorded."""
