import inspect

from tensorflow_datasets.core import shuffle

from data_prep.records import disk_sort


def public(kind: type) -> dict[str, list[str]]:
    """{method: names of its arguments}"""
    methods = inspect.getmembers(kind, inspect.isfunction)
    return {
        name: list(inspect.signature(method).parameters)
        for name, method in methods
        if name in ("__init__", "__len__") or not name.startswith("_")
    }


def test_tfds_still_asks_of_a_bucket_what_ours_does():
    ours = public(disk_sort.Bucket)
    theirs = public(shuffle._Bucket)
    assert {name: len(arguments) for name, arguments in theirs.items() if name in ours} == {
        name: len(arguments) for name, arguments in ours.items()
    }
    assert theirs.keys() - ours.keys() <= {"flush"}  # Called by itself alone.
    source = inspect.getsource(shuffle.Shuffler)
    assert "_Bucket(" in source and shuffle.HKEY_SIZE == 8 * disk_sort.KEY_BYTES


def test_pairs_come_back_in_the_order_in_which_they_were_added(tmp_path):
    bucket = disk_sort.Bucket(tmp_path / "new" / "bucket")
    assert list(bucket.read_values()) == [] and len(bucket) == 0
    pairs = [(2**127 + 1, b"late"), (3, b""), (3, b"\0" * 100)]
    for key, data in pairs:
        bucket.add(key, data)
    assert list(bucket.read_values()) == pairs
    assert (len(bucket), bucket.size) == (3, 104)
    bucket.del_file()
    assert not (tmp_path / "new" / "bucket").exists()


def test_tfds_has_its_own_again_afterwards():
    before = shuffle._Bucket
    with disk_sort.without_tensorflow():
        assert shuffle._Bucket is disk_sort.Bucket
    assert shuffle._Bucket is before
