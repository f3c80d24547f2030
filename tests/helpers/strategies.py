"""Texts and tool calls for hypothesis. Texts have no "<", so no tag or control token appears by chance."""

from hypothesis import strategies as st

ANY = st.characters(exclude_characters="<", exclude_categories=["Cs"])
PLAIN = st.text(st.one_of(st.sampled_from(" \n\t.,'\"{}好世界的é😀aA1"), ANY), max_size=30)
VALUES = st.one_of(PLAIN, st.integers(), st.booleans(), st.none(), st.lists(PLAIN, max_size=3))
ARGUMENTS = st.dictionaries(PLAIN, VALUES, max_size=3)
CALLS = st.lists(st.fixed_dictionaries({"name": PLAIN, "arguments": ARGUMENTS}), max_size=2)
