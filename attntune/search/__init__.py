"""WHICH: configuration spaces, and searchers that propose configs from them. Knows nothing of TVM or records."""
