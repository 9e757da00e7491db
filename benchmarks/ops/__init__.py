"""One file per operator: its cases, its contenders, and the bytes that each case must move."""
