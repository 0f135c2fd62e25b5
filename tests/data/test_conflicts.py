from data_prep.corpus.plan import MISLEADING
from saber_jax.data.conflicts import CONFLICT_TYPES, NO_CONFLICT, conflict_index


def test_every_conflict_of_the_embedded_corpus_has_a_name_in_batches():
    assert {kind for _, kind in MISLEADING.values()} < set(CONFLICT_TYPES) - {NO_CONFLICT}


def test_an_unknown_name_counts_as_other():
    assert CONFLICT_TYPES[conflict_index("irony")] == "other"
    assert [CONFLICT_TYPES[conflict_index(name)] for name in CONFLICT_TYPES] == [*CONFLICT_TYPES]
