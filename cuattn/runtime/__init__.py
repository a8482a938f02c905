"""What stands between an operation and the executor that runs its kernel."""
