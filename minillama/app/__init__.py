"""The HTTP server and its chat page, in reading order: limits, protocol, models, endpoints, server.

What is imported here needs the extra `serve`; limits alone does not.
"""
