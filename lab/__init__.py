"""The rest of the paper, and tools: what a reader of the core may skip."""
