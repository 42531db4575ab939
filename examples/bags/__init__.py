"""Bags of handwritten digits: which contain a nine?"""
