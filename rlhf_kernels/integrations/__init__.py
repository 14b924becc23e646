"""The losses inside other people's trainers. Each module imports its host, and only when it is imported itself."""
