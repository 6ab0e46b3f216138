"""Packed message passing without kernels by hand: traced, by relation, by blocks of rows.

=============== ==========================================================================================
module          what is in it
=============== ==========================================================================================
``generic``     the packed form of any ``MessagePassing``, and which way each of its calls goes
``call``        one call of ``propagate``, as functions of edges see it
``nodes``       node features in packed rows that stand for floats
``row_blocks``  the layer's own functions by blocks of whole rows
``row_checks``  whether they treat every row for itself
``plans``       graphs, and what follows from them, found by the contents of edges
``own_weights`` layers with weights that no linear layer holds
``relations``   RGCNConv and FastRGCNConv; ``rgat`` and ``han`` the layers of these names
=============== ==========================================================================================
"""
