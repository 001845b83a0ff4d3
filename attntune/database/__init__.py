"""REMEMBER: every trial ever measured, in append-only journals, and which schedule they say to use."""
