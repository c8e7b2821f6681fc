"""The ``omega-qvla`` command, one module per group of verbs."""
