"""Whether driver and actors run the same code."""

import pickle

import pytest

from rlhf_cluster.errors import RunError
from rlhf_cluster.util.provenance import DIGEST_VARIABLE, check_same_code, code_digest


def test_n17_a_node_with_other_code_is_refused_by_name():
    check_same_code({}, "node 10.0.0.7")  # started by nobody who says what it has
    check_same_code({DIGEST_VARIABLE: code_digest()}, "node 10.0.0.7")
    with pytest.raises(
        RunError, match=r"node 10\.0\.0\.7 has other code .*same checkout"
    ) as caught:
        check_same_code({DIGEST_VARIABLE: "0123456789abcdef"}, "node 10.0.0.7")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
