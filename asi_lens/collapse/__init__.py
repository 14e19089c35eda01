"""The paper's first half: attention writes few directions; their effect on the loss and their origin."""
