"""The paper's first half: how few directions attention writes, what they cost, where it comes from."""
