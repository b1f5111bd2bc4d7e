"""What grpcio's releases differ in: the environment of the tests holds one that chooses handlers the new way."""

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from isthmus.config import RouterConfig
from isthmus.v1 import inference_pb2_grpc
from router.client.grpc_caller import InferenceServer


def test_the_tests_run_on_a_grpcio_whose_registered_handlers_win() -> None:
    """Every test that talks to a router's port is then a round trip on such a release."""
    assert tuple(map(int, version("grpcio").split(".")[:2])) >= (1, 84)


def test_every_method_of_the_service_has_one_handler_and_no_other() -> None:
    added: list[Any] = []
    server: Any = SimpleNamespace(
        add_generic_rpc_handlers=lambda handlers: added.extend(handlers),
        add_registered_method_handlers=lambda *_: added.append("a second handler of the same methods"),
    )
    InferenceServer(RouterConfig(name="r0")).register(server)

    (table,) = added
    servicer = inference_pb2_grpc.InferenceServiceServicer
    names = {name for name in vars(servicer) if not name.startswith("_")}
    methods = {name: table.service(SimpleNamespace(method=f"/isthmus.v1.InferenceService/{name}")) for name in names}
    assert None not in methods.values()
