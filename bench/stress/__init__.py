"""Long tests of how the package behaves when it is used wrongly or interrupted; the suite runs a little of each."""
