"""edgecomp.numerics"""
