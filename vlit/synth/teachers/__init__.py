"""Teachers: who answers the prompts of a recipe. One file a teacher, registered in ``TEACHERS``."""
