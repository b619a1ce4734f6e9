"""The Faust shell: intake, meter and rollup, their tables, and what they publish. Only this package knows Faust."""
