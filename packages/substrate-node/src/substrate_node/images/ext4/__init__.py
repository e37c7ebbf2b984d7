"""A read-only ext4 file system from a tree in memory: no root, no mount, no other program, the same bytes every time.

`plan` decides where everything lies, purely; `render` gives the bytes from the first to the last.
"""

from substrate_node.images.ext4.plan import Plan as Plan
from substrate_node.images.ext4.plan import plan as plan
from substrate_node.images.ext4.render import render as render
