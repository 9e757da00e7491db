from tests.server.conftest import backend

__all__ = ["backend"]
