"""The service without its bills, to measure what they cost: the product itself has no such switch."""

# No `from __future__ import annotations`: Serve validates `args` against the builder's annotation if it is a type.
from ray import serve
from ray.serve import Application

from serve_app import app
from serve_app.books import Books
from serve_app.core.keys import Workspace
from serve_app.core.ledger import UsageEvent
from serve_app.core.settings import IngressSettings
from serve_app.deployments.ingress import IngressReplica
from serve_app.deployments.models import LiveModels
from serve_app.service import Service
from serve_app.stores import Store


class ForNothing(Books):
    async def bill(self, workspace: Workspace, event: UsageEvent) -> None:
        pass


class UnbilledIngress(IngressReplica):
    def service(self, models: LiveModels, store: Store) -> Service:
        service = super().service(models, store)
        service._books.__class__ = ForNothing  # the product's own object, but for one method
        return service


def ingress(settings: IngressSettings) -> Application:
    app._ingress = serve.deployment(serve.ingress()(UnbilledIngress))  # in this process: the one that builds
    return app.ingress(settings)
