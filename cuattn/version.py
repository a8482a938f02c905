"""The version of the package, for the modules below the public names."""

__version__ = "0.1.0"
