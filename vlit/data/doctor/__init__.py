"""``vlit doctor``: every bad record of a run's datasets, found before training.

| file | what it does |
|---|---|
| ``checks.py`` | the table of checks: severity, what is wrong, what to do |
| ``image_file.py`` | looks at one image file |
| ``pictures.py`` | the distinct images of all datasets, and which records show them |
| ``records.py`` | reads rows of an index in bulk; tokenises a record |
| ``repeats.py`` | records that share an id |
| ``pool.py`` | worker processes that may die; names the item a worker died of |
| ``spool.py`` | findings on disk, so that memory does not grow with them |
| ``datasets.py`` | what is to be examined: each dataset once, whatever number of stages uses it |
| ``scan.py`` | the phases: read, images, records, write |
| ``tally.py`` | counts |
| ``examples.py`` | a few examples of each check, with excerpt and picture |
| ``manifest.py`` | ``manifest.jsonl``: written here, honoured by :func:`vlit.data.source.open_source` |
"""
