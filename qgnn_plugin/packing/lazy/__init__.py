"""Values that are computed when they are asked for: results of packed layers, and their weights as floats.

A layer does not return floats but a *producer*: how to compute them by blocks of rows, as floats or as codes in a range
to be given.  What follows is noted on it, until a layer asks for its own codes, or something for floats:

================ =======================================================================================
module           what is in it
================ =======================================================================================
``producers``    :class:`~.producers.Producer`, a matrix not computed yet, and blocks of rows
``steps``        what follows row by row: activations, norms, numbers; the epilogue of kernels in floats
``deferred``     :class:`~.deferred.DeferredTensor`, which is a producer and its steps to code of the model
``columns``      parts of a result, results whose rows have dimensions, results side by side
``sums``         sums and products of two results, and of a stack of them
``gathers``      rows of nodes for each edge, by the model's own code
``asked``        ranges that one result is packed in together
``runs``         how often a result was computed: of those that are twice, floats are written
``calls``        the call of a model, at whose end what is left is computed
``scoped``       the class of a model whose calls are such
``of_nodes``     maps of what edges have, computed for nodes where messages are run by blocks
``weight``       the weight of a packed layer as a matrix of floats that are computed when read
``stand_in``     what both kinds of tensors do where memory is read past the dispatcher
``sizes``        from which sizes on any of this is worth it
================ =======================================================================================
"""
