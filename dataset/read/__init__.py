"""Files in any layout -> canonical rows."""
