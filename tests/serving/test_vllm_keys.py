"""Who may change a server's skills."""

import pytest

pytest.importorskip("vllm")

from hotgraft.serve.vllm.admin import Keys, RefusedError


def test_keys():
    Keys(admin="a").require({"x-hotgraft-admin-key": "a"})
    Keys(api=["b", "c"]).require({"authorization": "Bearer c"})
    for keys, headers in [
        (Keys(admin="a", api=["b"]), {"authorization": "Bearer b"}),
        (Keys(api=["b"]), {"authorization": "b"}),
        (Keys(api=["b"]), {}),
        (Keys(), {"x-hotgraft-admin-key": ""}),
    ]:
        with pytest.raises(RefusedError):
            keys.require(headers)
