"""Questions and keys go to the server that the user named, and to no other."""

import pytest
from chat_server import Answer, serving

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.endpoint import ChatRequest, Endpoint, EndpointSpec


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/v1", "//host/v1", "javascript:alert(1)", "/etc/passwd"])
def test_a_server_is_asked_over_http_alone(address: str) -> None:
    with pytest.raises(UserError, match="must open with http:// or https://"):
        EndpointSpec(address, "m")


@pytest.mark.parametrize("target", ["http", "file:///etc/passwd"])
@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_is_not_followed(status: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """307 and 308 would hand on the question; a client may hand on the key as well."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-user")
    with serving(lambda *_: Answer()) as other:
        location = f"{other.base_url}/chat/completions" if target == "http" else target
        with serving(lambda *_: Answer(status=status, headers={"Location": location})) as server:
            request = ChatRequest([{"role": "user", "content": "private"}], 5, 0.0)
            [(_, reply)] = Endpoint(EndpointSpec(server.base_url, "m")).replies([(0, request)])
        assert reply.text is None and str(status) in (reply.error or "")
        assert other.asked == []
