"""The HTTP front: who may come in, what reaches a guest, and how errors are told. Only here are there statuses."""

from substrate_cluster.ingress.admin import Page, admin_app
from substrate_cluster.ingress.app import public_app
from substrate_cluster.ingress.errors import Refusal, head_refusals
from substrate_cluster.ingress.hosts import default_hosts, is_loopback, refuse_open
from substrate_cluster.ingress.invocations import Limits

__all__ = [
    "Limits",
    "Page",
    "Refusal",
    "admin_app",
    "default_hosts",
    "head_refusals",
    "is_loopback",
    "public_app",
    "refuse_open",
]
