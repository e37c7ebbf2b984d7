"""OCI images as read-only ext4 root file systems: no root, no container engine, no program of the machine's.

`opened` finds the image in a layout or an archive (`image_of` in any other store of blobs), `ImageStore.build` makes a
file system of it. What layers hold is data here, never files of ours: nothing in an image can reach the host.
"""

from substrate_node.images.documents import ARCHITECTURES as ARCHITECTURES
from substrate_node.images.documents import Descriptor as Descriptor
from substrate_node.images.problems import ImageUnusable as ImageUnusable
from substrate_node.images.problems import Limits as Limits
from substrate_node.images.problems import Progress as Progress
from substrate_node.images.sources import Blobs as Blobs
from substrate_node.images.sources import Image as Image
from substrate_node.images.sources import image_of as image_of
from substrate_node.images.sources import opened as opened
from substrate_node.images.store import Built as Built
from substrate_node.images.store import ImageStore as ImageStore
from substrate_node.images.store import locked as locked
