"""The forescale command."""
