import jax

from saber_jax.models import saber
from saber_jax.models.config import saber_config
from saber_jax.tree import flatten, merge


def test_flatten_names_leaves_by_their_path_and_merge_undoes_it():
    tree = {"text": {"norm": 1, "mlp": {"up": 2}}, "bos": (3, 4)}
    flat = {"text/norm": 1, "text/mlp/up": 2, "bos": (3, 4)}
    assert flatten(tree) == flat
    assert merge(flat) == tree
    assert flatten(tree, ".") == {"text.norm": 1, "text.mlp.up": 2, "bos": (3, 4)}


def test_merge_joins_parts_of_one_tree():
    assert merge({"a/b": 1}, {"a/c": 2}) == {"a": {"b": 1, "c": 2}}


def test_merge_undoes_flatten_of_the_networks_parameters():
    params = saber.abstract(saber_config("tiny"))
    assert jax.tree.structure(merge(flatten(params))) == jax.tree.structure(params)
    assert jax.tree.leaves(merge(flatten(params))) == jax.tree.leaves(params)
