"""Facts: discovery, isolated workers, the timer, and what they find out about operators, segments and whole models."""
