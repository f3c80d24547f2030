"""What every script needs, and nothing about models or data: options, messages, files."""
