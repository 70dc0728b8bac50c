"""Parts that every other package uses: errors, files, JSON, text, the terminal."""
