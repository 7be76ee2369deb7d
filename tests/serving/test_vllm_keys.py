"""Who may change a server's skills, and what becomes of changes at its end."""

import asyncio
import threading

import pytest

pytest.importorskip("vllm")

from hotgraft.errors import HotgraftError
from hotgraft.serve.vllm import server
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


@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_call_that_the_end_of_a_server_leaves_unanswered_ends_too(monkeypatch):
    """Python waits for its thread, and would for ever."""

    class Client:
        async def collective_rpc(self, method, args):
            raise AssertionError(f"nobody runs {method}{args}")

    async def begin():
        return server.Engine(Client())

    def call():
        try:
            engine.collective_rpc("hotgraft", ("withdraw", ("sql", "token")))
        except HotgraftError as error:
            found.append(str(error))

    monkeypatch.setattr(server, "LOOK", 0.01)
    loop, found = asyncio.new_event_loop(), []
    engine = loop.run_until_complete(begin())
    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(0.05)
    assert calling.is_alive()
    loop.close()
    calling.join(10)
    assert found == ["the server has ended"]
    with pytest.raises(HotgraftError, match="has ended"):  # and what comes later
        engine.collective_rpc("hotgraft", ("withdraw", ("sql", "token")))
