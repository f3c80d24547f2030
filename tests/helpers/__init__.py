"""What several test files share.

Tests mirror the tree: `tests/model/test_lora.py` tests `model/lora.py`; tests of a whole page, recipe or fault stand in
`tests/` itself. Test files do not import each other. What two of them need is here: `rows.py` writes data, `layouts.py`
holds one row in every layout, `tokenizers.py` and `models.py` make small ones, `runs.py` trains, `compare.py` compares.
Files named `*_run.py` are what torchrun starts. Fixtures are in the nearest `conftest.py`.
"""
