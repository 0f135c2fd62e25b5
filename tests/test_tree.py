from saber_jax.tree import flatten, merge


def test_flatten_names_leaves_by_their_path_and_merge_undoes_it():
    tree = {"text": {"norm": 1, "mlp": {"up": 2}}, "bos": (3, 4)}
    flat = {"text/norm": 1, "text/mlp/up": 2, "bos": (3, 4)}
    assert flatten(tree) == flat
    assert merge(flat) == tree
    assert flatten(tree, ".") == {"text.norm": 1, "text.mlp.up": 2, "bos": (3, 4)}


def test_merge_joins_parts_of_one_tree():
    assert merge({"a/b": 1}, {"a/c": 2}) == {"a": {"b": 1, "c": 2}}
