"""What the Python functions take and return: options by name, progress, results, and how those look in a notebook."""
