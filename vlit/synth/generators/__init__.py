"""Image generators: pictures from image prompts. One file a generator, registered in ``GENERATORS``."""
