"""The data engine: pictures and annotations in, visual instructions out, through teachers and published recipes."""
