"""edgecomp.graph"""
