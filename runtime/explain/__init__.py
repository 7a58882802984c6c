"""Where the error of one model against another comes from, node by node.

    x ──► site ──► t ──► the rest ──► y          e = site_B(x_A) - site_A(x_A)          dy = y_A(t + e) - y_A(t)

``align`` finds the tensors that both models compute, ``strangers`` drops those that do not mean the same. They ``cut``
the second model into sites. A site is given the values of the *first* model, so that the error e at its end is its own.
What it computes then replaces t in the first model, where what that does to the outputs is the contribution of the site
(``attribute``). Nothing is said of a node without having run it.
"""
