"""The version, apart from what a program imports with the package."""

__version__ = "0.1.0.dev0"
