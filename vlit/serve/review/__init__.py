"""``vlit synth review``: accept, edit and reject records on a local page. See docs/data-quality.md."""
