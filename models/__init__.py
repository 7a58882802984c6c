"""Small trained networks that ship with the package."""
